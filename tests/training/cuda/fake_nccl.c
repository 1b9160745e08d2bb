/* A libnccl.so.2 for tests: what _nccl.py calls, by NCCL's declarations, between processes of one machine.
 *
 * The device's memory is the process's own. A message is a file in FAKE_NCCL_DIR, which appears when it is whole and is
 * removed by its receiver. Communicators do not block: whatever waits for another rank is in progress, and goes on in
 * ncclCommGetAsyncError. Stricter than NCCL: a message must lie in a group and be as long as its receiver expects.
 *
 * FAKE_NCCL_VERSION  what ncclGetVersion says
 * FAKE_NCCL_FAULT    RANK:NUMBER:WHAT; in its NUMBER-th group (from 0) that rank is killed (WHAT "kill"), or the network
 *                    fails under it ("error"), which it learns when it asks
 */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SUCCESS, CUDA_ERROR, SYSTEM_ERROR, INTERNAL_ERROR, INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR, IN_PROGRESS };
enum { MAX_RANKS = 64, MAX_PARTS = 1024, UINT8 = 1 };

typedef struct { char internal[128]; } ncclUniqueId;
typedef struct { size_t size; unsigned magic, version; int blocking; } ncclConfig;

/* One message of this rank: to a peer, or from it. */
struct part {
    int receives, peer;
    unsigned number; /* of the messages from the sender to the receiver, from 0 */
    size_t size;     /* bytes at data */
    char *data;
};

struct ncclComm {
    int rank, size, connected, failed, n_groups, n_pending;
    char id[128];
    unsigned sent[MAX_RANKS], received[MAX_RANKS];
    struct part pending[MAX_PARTS]; /* receives of earlier groups that have not arrived */
};

static int group_depth, n_parts;
static struct part parts[MAX_PARTS]; /* of the open group */
static struct ncclComm *group_of;    /* the communicator of parts */

static const char *folder(void) {
    const char *named = getenv("FAKE_NCCL_DIR");
    return named ? named : ".";
}

static void message_path(char *path, size_t n, const struct ncclComm *comm, int from, int to, unsigned number) {
    snprintf(path, n, "%s/%s.%d-%d.%u", folder(), comm->id, from, to, number);
}

/* Whether this group is the one in which `what` befalls the rank. */
static int befalls(const struct ncclComm *comm, const char *what) {
    const char *fault = getenv("FAKE_NCCL_FAULT");
    char wanted[64];
    snprintf(wanted, sizeof wanted, "%d:%d:%s", comm->rank, comm->n_groups, what);
    return fault && strcmp(fault, wanted) == 0;
}

/* Write a message under a temporary name and rename it. */
static int send_part(struct ncclComm *comm, const struct part *part) {
    char path[512], temporary[520];
    message_path(path, sizeof path, comm, comm->rank, part->peer, part->number);
    snprintf(temporary, sizeof temporary, "%s.new", path);
    int file = open(temporary, O_WRONLY | O_CREAT | O_EXCL, 0600);
    if (file < 0) return SYSTEM_ERROR;
    ssize_t written = write(file, part->data, part->size);
    close(file);
    if (written != (ssize_t)part->size || rename(temporary, path)) return SYSTEM_ERROR;
    return SUCCESS;
}

/* SUCCESS when the message has been received, IN_PROGRESS while it is not there. */
static int receive_part(struct ncclComm *comm, const struct part *part) {
    char path[512];
    struct stat found;
    message_path(path, sizeof path, comm, part->peer, comm->rank, part->number);
    int file = open(path, O_RDONLY);
    if (file < 0) return IN_PROGRESS;
    int fits = fstat(file, &found) == 0 && (size_t)found.st_size == part->size;
    ssize_t got = fits ? read(file, part->data, part->size) : -1;
    close(file);
    unlink(path);
    return got == (ssize_t)part->size ? SUCCESS : INVALID_ARGUMENT;
}

/* Go on with what is in progress. */
static int progress(struct ncclComm *comm) {
    char path[512];
    if (comm->failed) return comm->failed;
    for (int rank = 0; !comm->connected && rank < comm->size; rank++) {
        snprintf(path, sizeof path, "%s/%s.rank%d", folder(), comm->id, rank);
        if (access(path, F_OK)) return IN_PROGRESS;
    }
    comm->connected = 1;
    int left = 0;
    for (int i = 0; i < comm->n_pending; i++) {
        int status = receive_part(comm, &comm->pending[i]);
        if (status == IN_PROGRESS) comm->pending[left++] = comm->pending[i];
        else if (status != SUCCESS) return comm->failed = status;
    }
    comm->n_pending = left;
    return left ? IN_PROGRESS : SUCCESS;
}

int ncclGetVersion(int *version) {
    const char *said = getenv("FAKE_NCCL_VERSION");
    *version = said ? atoi(said) : 22703;
    return SUCCESS;
}

const char *ncclGetErrorString(int status) {
    static const char *names[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error",
                                  "invalid argument", "invalid usage", "remote process exited or there was a network error",
                                  "in progress"};
    return names[status];
}

int ncclGetUniqueId(ncclUniqueId *id) {
    static int count;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "%d-%d", (int)getpid(), count++);
    return SUCCESS;
}

int ncclCommInitRankConfig(struct ncclComm **comm, int size, ncclUniqueId id, int rank, const ncclConfig *config) {
    char path[512];
    if (config->size != sizeof *config || config->magic != 0xcafebeef || config->version != 21400 || config->blocking)
        return INVALID_ARGUMENT;
    if (size < 1 || size > MAX_RANKS || rank < 0 || rank >= size || !id.internal[0]) return INVALID_ARGUMENT;
    struct ncclComm *made = calloc(1, sizeof *made);
    if (!made) return SYSTEM_ERROR;
    made->rank = rank;
    made->size = size;
    snprintf(made->id, sizeof made->id, "%s", id.internal);
    snprintf(path, sizeof path, "%s/%s.rank%d", folder(), made->id, rank);
    int file = open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
    if (file < 0) return INVALID_USAGE; /* twice the same rank */
    close(file);
    *comm = made;
    return IN_PROGRESS;
}

int ncclCommGetAsyncError(struct ncclComm *comm, int *state) {
    if (!comm) return INVALID_ARGUMENT;
    *state = progress(comm);
    return SUCCESS;
}

int ncclCommAbort(struct ncclComm *comm) {
    free(comm);
    return SUCCESS;
}

int ncclGroupStart(void) {
    group_depth++;
    return SUCCESS;
}

static int add_part(int receives, void *data, size_t size, int type, int peer, struct ncclComm *comm) {
    if (!comm || group_depth != 1 || (n_parts && comm != group_of)) return INVALID_USAGE;
    if (type != UINT8 || peer < 0 || peer >= comm->size || peer == comm->rank || n_parts == MAX_PARTS)
        return INVALID_ARGUMENT;
    unsigned *counter = receives ? comm->received : comm->sent;
    parts[n_parts++] = (struct part){receives, peer, counter[peer]++, size, data};
    group_of = comm;
    return IN_PROGRESS;
}

int ncclSend(const void *data, size_t size, int type, int peer, struct ncclComm *comm, void *stream) {
    (void)stream;
    return add_part(0, (void *)data, size, type, peer, comm);
}

int ncclRecv(void *data, size_t size, int type, int peer, struct ncclComm *comm, void *stream) {
    (void)stream;
    return add_part(1, data, size, type, peer, comm);
}

int ncclGroupEnd(void) {
    if (--group_depth || !n_parts) return group_depth ? INVALID_USAGE : SUCCESS;
    struct ncclComm *comm = group_of;
    int count = n_parts;
    n_parts = 0;
    if (befalls(comm, "kill")) raise(SIGKILL);
    if (befalls(comm, "error")) comm->failed = REMOTE_ERROR;
    comm->n_groups++;
    for (int i = 0; i < count && !comm->failed; i++) {
        if (!parts[i].receives) comm->failed = send_part(comm, &parts[i]);
        else if (comm->n_pending == MAX_PARTS) return INTERNAL_ERROR;
        else comm->pending[comm->n_pending++] = parts[i];
    }
    return IN_PROGRESS;
}
