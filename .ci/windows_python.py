"""What an extension of the stable ABI needs of a Python for Windows, made without one: .ci/windows_python.py OUTDIR

OUTDIR/include: the headers of the Python that runs this, which are every system's but for pyconfig.h; of that, the stable ABI
reads a few lines. OUTDIR/python3.def: the names in python3.dll, of which `zig dlltool` makes the library to link with.
"""

import shutil
import sys
import sysconfig
from pathlib import Path

from abi3info import DATAS, FUNCTIONS

PYCONFIG = """\
#define MS_WIN32
#define MS_WIN64
#define MS_WINDOWS
#define HAVE_DECLSPEC_DLL
#define Py_ENABLE_SHARED
#define SIZEOF_SHORT 2
#define SIZEOF_INT 4
#define SIZEOF_LONG 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_VOID_P 8
#define SIZEOF_WCHAR_T 2
#define SIZEOF_TIME_T 8
#define ALIGNOF_SIZE_T 8
#define ALIGNOF_MAX_ALIGN_T 8
"""


def main(out: Path) -> None:
    not_for_it = shutil.ignore_patterns("pyconfig*", "internal")
    shutil.copytree(sysconfig.get_path("include"), out / "include", ignore=not_for_it)
    (out / "include" / "pyconfig.h").write_text(PYCONFIG)
    names = [one.name for one in FUNCTIONS] + [f"{one.name} DATA" for one in DATAS]
    (out / "python3.def").write_text("\n".join(["LIBRARY python3.dll", "EXPORTS", *sorted(names)]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
