/* A CUDA driver (libcuda.so.1) that runs nothing; Triton's kernels come here. Stubs of the rest follow (`library.py`). */
#include <stdint.h>

extern void dry_count(const char *name) __attribute__((weak));
static void count(const char *name) { if (dry_count) dry_count(name); }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { if (flags) *flags = 0; *active = 1; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetCount(int *number) { *number = 8; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {                 /* CUdevice_attribute */
    case 1: *value = 1024; break;        /* threads of a block */
    case 8: *value = 48 << 10; break;    /* shared memory of a block */
    case 10: *value = 32; break;         /* threads of a warp */
    case 12: case 82: *value = 1 << 16; break; /* registers of a block, of a multiprocessor */
    case 16: *value = 132; break;        /* multiprocessors */
    case 39: *value = 2048; break;       /* threads of a multiprocessor */
    case 75: *value = 9; break;          /* compute capability, major */
    case 76: *value = 0; break;          /* and minor */
    case 81: *value = 228 << 10; break;  /* shared memory of a multiprocessor */
    case 97: *value = 227 << 10; break;  /* the most shared memory of a block that asks for it */
    default: *value = 1000000;
    }
    return 0;
}
int cuModuleLoadData(void **module, const void *data) { *module = (void *)16; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)16; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error of a driver that is not there"; return 0; }
int cuOccupancyMaxActiveClusters(int *number, void *function, const void *config) { *number = 66; return 0; }
int cuPointerGetAttribute(void *value, int attribute, uintptr_t address) {
    if (attribute == 3) *(uintptr_t *)value = address;   /* as the device knows it */
    else *(int *)value = attribute == 2 ? 2 : 0;         /* kind of memory: the device's */
    return 0;
}
int cuLaunchKernel() { count("launches"); count("launches of Triton's"); return 0; }
int cuLaunchKernelEx() { count("launches"); count("launches of Triton's"); return 0; }
