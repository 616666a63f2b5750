/* A CUDA runtime, cuBLAS and NCCL that run nothing and count what they are asked for.
 *
 * Preloaded under a CUDA build of PyTorch. Device memory is address space that is never touched, so any size fits. A copy
 * from device to host gives zeros, all others do nothing. What is not here is a stub that counts its calls (`library.py`). */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#undef cudaGetDeviceProperties

/* Counters, by name. */

enum { MOST_COUNTERS = 4096 };
static struct { char *name; long count; } counters[MOST_COUNTERS];
static int known;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

long *dry_counter(const char *name) {
    pthread_mutex_lock(&lock);
    int at = 0;
    while (at < known && strcmp(counters[at].name, name)) at++;
    if (at == known && known < MOST_COUNTERS) counters[known++].name = strdup(name);
    pthread_mutex_unlock(&lock);
    return &counters[at < MOST_COUNTERS ? at : MOST_COUNTERS - 1].count;
}

void dry_count(const char *name) { ++*dry_counter(name); }

/* Lines "name count" of all counters; returns their length, which may be more than there was room for. */
int dry_counters(char *text, int room) {
    int length = 0;
    for (int at = 0; at < known; at++)
        length += snprintf(text + (length < room ? length : room), length < room ? room - length : 0, "%s %ld\n",
                           counters[at].name, counters[at].count);
    return length;
}

void dry_reset(void) { for (int at = 0; at < known; at++) counters[at].count = 0; }

#define COUNT { static long *own; if (!own) own = dry_counter(__func__); ++*own; }

/* Memory. */

enum { MOST_BLOCKS = 1 << 16 };
static struct { char *start; size_t bytes; } blocks[MOST_BLOCKS];
static int held;
static size_t used;

static size_t device_bytes(void) {
    const char *gib = getenv("SKVR_GPU_DRY_GIB");
    return (gib ? strtoull(gib, 0, 10) : 80ull) << 30;
}

static void *take(size_t bytes) {
    size_t size = bytes ? bytes : 1;
    if (used + bytes > device_bytes() || held == MOST_BLOCKS) return 0;
    void *start = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return 0;
    pthread_mutex_lock(&lock);
    blocks[held].start = start;
    blocks[held++].bytes = size;
    used += size;
    pthread_mutex_unlock(&lock);
    return start;
}

static void give_back(void *start) {
    pthread_mutex_lock(&lock);
    for (int at = 0; at < held; at++) {
        if (blocks[at].start != start) continue;
        munmap(start, blocks[at].bytes);
        used -= blocks[at].bytes;
        blocks[at] = blocks[--held];
        break;
    }
    pthread_mutex_unlock(&lock);
}

static int on_device(const void *address) {
    for (int at = 0; at < held; at++)
        if ((char *)address >= blocks[at].start && (char *)address < blocks[at].start + blocks[at].bytes) return 1;
    return 0;
}

cudaError_t cudaMalloc(void **start, size_t bytes) { COUNT return (*start = take(bytes)) ? 0 : cudaErrorMemoryAllocation; }
cudaError_t cudaFree(void *start) { COUNT if (start) give_back(start); return 0; }
cudaError_t cudaHostAlloc(void **start, size_t bytes, unsigned flags) {
    COUNT return posix_memalign(start, 4096, bytes ? bytes : 1) ? cudaErrorMemoryAllocation : 0;
}
cudaError_t cudaFreeHost(void *start) { COUNT free(start); return 0; }
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) { *total = device_bytes(); *left = *total - used; return 0; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
    memset(found, 0, sizeof *found);
    found->type = on_device(address) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    found->devicePointer = found->hostPointer = (void *)address;
    return 0;
}

static cudaError_t copy(void *to, const void *from, size_t bytes) {
    int here = !on_device(to), there = on_device(from);
    dry_count(here && there ? "copies to host" : here ? "copies on host" : there ? "copies on device" : "copies to device");
    if (here && there) memset(to, 0, bytes);
    else if (here) memmove(to, from, bytes);
    return 0;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) { COUNT return copy(to, from, bytes); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    COUNT return copy(to, from, bytes);
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) { COUNT return 0; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) { COUNT return 0; }
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) { *address = take(1 << 20); return 0; }

/* The device: eight H100s, as far as anyone asks. */

static __thread int current;
cudaError_t cudaGetDeviceCount(int *count) { *count = 8; return 0; }
cudaError_t cudaGetDevice(int *device) { *device = current; return 0; }
cudaError_t cudaSetDevice(int device) { current = device; return 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int room, int device) { snprintf(text, room, "0000:00:00.0"); return 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *of, int device) {
    memset(of, 0, sizeof *of);
    strcpy(of->name, "NVIDIA H100 that is not there");
    of->major = 9;
    of->multiProcessorCount = 132;
    of->totalGlobalMem = device_bytes();
    of->warpSize = 32;
    of->maxThreadsPerBlock = 1024;
    of->maxThreadsPerMultiProcessor = 2048;
    of->sharedMemPerBlock = 48 << 10;
    of->sharedMemPerBlockOptin = 227 << 10;
    of->sharedMemPerMultiprocessor = 228 << 10;
    of->regsPerBlock = of->regsPerMultiprocessor = 1 << 16;
    of->l2CacheSize = 50 << 20;
    of->maxGridSize[0] = INT32_MAX;
    of->maxGridSize[1] = of->maxGridSize[2] = UINT16_MAX;
    of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024;
    of->maxThreadsDim[2] = 64;
    of->unifiedAddressing = of->concurrentKernels = 1;
    of->asyncEngineCount = 3;
    of->memoryBusWidth = 5120;
    of->textureAlignment = 512;
    return 0;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxGridDimX: *value = INT32_MAX; break;
    default: *value = 1;
    }
    return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *of, const void *kernel) {
    memset(of, 0, sizeof *of);
    of->maxThreadsPerBlock = 1024;
    of->numRegs = 32;
    of->binaryVersion = of->ptxVersion = 90;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *kernel, int threads, size_t shared) {
    *count = 2;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *kernel, int threads,
                                                                   size_t shared, unsigned flags) {
    *count = 2;
    return 0;
}

/* Streams and events, which are numbers; all that is asked of them is done already. */

static uintptr_t handle(void) { static uintptr_t last = 0x1000; return __sync_add_and_fetch(&last, 16); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { *s = (cudaStream_t)handle(); return 0; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { *s = (cudaStream_t)handle(); return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { *e = (cudaEvent_t)handle(); return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = (cudaEvent_t)handle(); return 0; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; return 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { COUNT return 0; }
cudaError_t cudaDeviceSynchronize(void) { COUNT return 0; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { COUNT return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *of) {
    *of = cudaStreamCaptureStatusNone;
    return 0;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *of, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    *of = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    return 0;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return 0; }
cudaError_t cudaGetLastError(void) { return 0; }
cudaError_t cudaPeekAtLastError(void) { return 0; }
const char *cudaGetErrorString(cudaError_t e) { return "an error of a device that is not there"; }
const char *cudaGetErrorName(cudaError_t e) { return "notThere"; }

/* Kernels. */

static __thread struct { dim3 grid, block; size_t shared; void *stream; } launch;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    launch.grid = grid; launch.block = block; launch.shared = shared; launch.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = launch.grid; *block = launch.block; *shared = launch.shared; *(void **)stream = launch.stream;
    return 0;
}
void **__cudaRegisterFatBinary(void *binary) { static void *made; return &made; }
cudaError_t __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }
cudaError_t __cudaLaunchKernel() { dry_count("launches"); return 0; }
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) { dry_count("launches"); return 0; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { dry_count("launches"); return 0; }

/* The driver's functions that the runtime hands out. */

static int nothing(void) { return 0; }
static int primary_context(int device, unsigned *flags, int *active) { if (flags) *flags = 0; *active = 1; return 0; }
static int current_context(void **context) { *context = (void *)1; return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    *function = !strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)primary_context
              : !strcmp(name, "cuCtxGetCurrent")            ? (void *)current_context
                                                            : (void *)nothing;
    if (result) *result = 0;
    return 0;
}

/* cuBLAS. */

int cublasCreate_v2(void **of) { *of = (void *)16; return 0; }
int cublasLtCreate(void **of) { *of = (void *)16; return 0; }
int cublasGetVersion_v2(void *of, int *version) { *version = 130100; return 0; }
int cublasGetStream_v2(void *of, void **stream) { *stream = 0; return 0; }
int cublasGetPointerMode_v2(void *of, int *mode) { *mode = 0; return 0; }
int cublasGetMathMode(void *of, int *mode) { *mode = 0; return 0; }
int cublasGemmEx() { dry_count("products"); return 0; }
int cublasSgemm_v2() { dry_count("products"); return 0; }
int cublasGemmStridedBatchedEx() { dry_count("products"); return 0; }
int cublasSgemmStridedBatched() { dry_count("products"); return 0; }
int cublasLtMatmul() { dry_count("products"); return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *l, void *o, void *a, void *b, void *c, void *d, void *p, int wanted, void *found,
                                   int *count) {
    *count = 1;
    return 0;
}

/* NCCL: nothing is sent. Calls are written down, if SKVR_GPU_DRY_NCCL names a file (`order.py` reads it). */

typedef struct { long words[16]; } unique_id;

static FILE *nccl_log(void) {
    static FILE *file;
    const char *name = getenv("SKVR_GPU_DRY_NCCL");
    if (!file && name) file = fopen(name, "w");
    return file;
}
static void note(const char *operation, void *communicator, size_t count, int peer) {
    dry_count(operation);
    if (!nccl_log()) return;
    fprintf(nccl_log(), "%s %lx %zu %d\n", operation, (long)communicator, count, peer);
    fflush(nccl_log());
}
/* The same id on all ranks of a communicator; a split one has that of what it is made of, and which split it is. */
static int communicator(void **made, int ranks, int rank, const unique_id *id) {
    *made = (void *)handle();
    if (nccl_log()) fprintf(nccl_log(), "init %lx %lx-%lx %d %d\n", (long)*made, id->words[0], id->words[1], ranks, rank);
    return 0;
}
int ncclGetVersion(int *version) { *version = 22907; return 0; }
int ncclGetUniqueId(unique_id *id) { static long last; memset(id, 0, sizeof *id); id->words[0] = getpid(); id->words[1] = ++last; return 0; }
int ncclCommInitRank(void **made, int ranks, unique_id id, int rank) { return communicator(made, ranks, rank, &id); }
int ncclCommInitRankConfig(void **made, int ranks, unique_id id, int rank, void *config) { return communicator(made, ranks, rank, &id); }
int ncclCommInitRankScalable(void **made, int ranks, int rank, int ids, const unique_id *id, void *config) { return communicator(made, ranks, rank, id); }
int ncclCommSplit(void *of, int color, int key, void **made, void *config) {
    *made = (void *)handle();
    if (nccl_log()) fprintf(nccl_log(), "split %lx %lx %d %d\n", (long)*made, (long)of, color, key);
    return 0;
}
int ncclGroupStart(void) { note("group_start", 0, 0, -1); return 0; }
int ncclGroupEnd(void) { note("group_end", 0, 0, -1); return 0; }
int ncclCommGetAsyncError(void *of, int *error) { *error = 0; return 0; }
int ncclCommCount(void *of, int *count) { *count = 1; return 0; }
int ncclCommUserRank(void *of, int *rank) { *rank = 0; return 0; }
const char *ncclGetErrorString(int error) { return "an error of a network that is not there"; }
const char *ncclGetLastError(void *of) { return ""; }
int ncclSend(const void *from, size_t n, int type, int peer, void *c, void *s) { note("send", c, n, peer); return 0; }
int ncclRecv(void *to, size_t n, int type, int peer, void *c, void *s) { note("recv", c, n, peer); return 0; }
int ncclAllReduce(const void *a, void *b, size_t n, int t, int op, void *c, void *s) { note("all_reduce", c, n, -1); return 0; }
int ncclAllGather(const void *a, void *b, size_t n, int t, void *c, void *s) { note("all_gather", c, n, -1); return 0; }
int ncclReduceScatter(const void *a, void *b, size_t n, int t, int op, void *c, void *s) { note("reduce_scatter", c, n, -1); return 0; }
int ncclBroadcast(const void *a, void *b, size_t n, int t, int root, void *c, void *s) { note("broadcast", c, n, root); return 0; }
int ncclReduce(const void *a, void *b, size_t n, int t, int op, int root, void *c, void *s) { note("reduce", c, n, root); return 0; }
