"""Ray Serve: replicas of a model behind one address, each the whole OpenAI-compatible server (and a page).

    pip install 'pyengine-lm[serve]' 'ray[serve]'
    PYENGINE_MODEL=/models/model.safetensors serve run docs.scaling.ray_serve:app

Every machine of the cluster must have the file at that path: it is mapped, so replicas of a machine share its memory. Requests
with the same header X-Session-Id go to the same replica, which has the conversation in its cache.
"""

from __future__ import annotations

import os

from ray import serve
from ray.serve.config import RequestRouterConfig

from pyengine import Engine
from pyengine.serve.app import App
from pyengine.serve.models import Models, ServedModel
from pyengine.serve.settings import Settings

MODEL = os.environ["PYENGINE_MODEL"]
REPLICAS = int(os.environ.get("PYENGINE_REPLICAS", "2"))
THREADS = int(os.environ.get("PYENGINE_THREADS", "1"))  # of each; Ray reserves as many CPUs for it


def build() -> App:
    """In the replica."""
    app = App(Settings())
    name = os.path.splitext(os.path.basename(MODEL))[0]
    app.start(Models([ServedModel(name, Engine(MODEL, n_threads=THREADS))]))
    return app


@serve.deployment(
    num_replicas=REPLICAS,
    max_ongoing_requests=64,  # a replica batches what it is given
    ray_actor_options={"num_cpus": THREADS},
    request_router_config=RequestRouterConfig(
        request_router_class="ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
    ),
)
@serve.ingress(build)
class Server:
    pass


app = Server.bind()
