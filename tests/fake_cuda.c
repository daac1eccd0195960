/* A libcuda.so.1 that launches nothing and writes down what it is asked to launch: with it, the way
 * from a Python call to cuLaunchKernelEx is tested on machines that have no GPU. */
#include "cuda.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static CUcontext current = (CUcontext)1;

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 12080; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 4; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = current; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { current = context; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 3; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the fake driver";
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448 : 65536;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = 0;
  if (attribute == CU_FUNC_ATTRIBUTE_NUM_REGS) *value = 64;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) *value = 1024;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)2;
  return memcmp(image, "\177ELF", 4) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  static size_t functions = 0;
  printf("load %s\n", name);
  fflush(stdout);
  *function = (CUfunction)++functions;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(data, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
    const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  cuuint64_t *word = (cuuint64_t *)map; /* so that the launch shows what was described */
  memset(map, 0, sizeof *map);
  *word++ = (cuuint64_t)address;
  *word++ = type | interleave << 8 | swizzle << 16 | promotion << 24;
  for (cuuint32_t i = 0; i < rank; i++) *word++ = shape[i], *word++ = box[i];
  for (cuuint32_t i = 0; i + 1 < rank; i++) *word++ = strides[i];
  printf("descriptor %p of %llu x %llu in boxes of %u x %u\n", address,
         (unsigned long long)shape[1], (unsigned long long)shape[0], box[1], box[0]);
  fflush(stdout);
  return CUDA_SUCCESS;
}
/* FAKE_CUDA_SIZES=8,4: the kernel has two parameters of so many bytes, which are to be shown. */
static void show_parameters(const CUlaunchConfig *config, CUfunction f, void **arguments) {
  const char *sizes = getenv("FAKE_CUDA_SIZES");
  if (!sizes) return;
  printf("function %zu, %u bytes shared, %u attributes, parameters", (size_t)f,
         config->sharedMemBytes, config->numAttrs);
  for (; *sizes; sizes += *sizes == ',') {
    const unsigned char *at = *arguments++;
    printf(" ");
    for (long size = strtol(sizes, (char **)&sizes, 10); size; size--) printf("%02x", *at++);
  }
  printf("\n");
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **arguments, void **more) {
  printf("launch %ux%ux%u of %u threads on stream %llu, first pointer %llx\n", config->gridDimX,
         config->gridDimY, config->gridDimZ, config->blockDimX,
         (unsigned long long)config->hStream, *(unsigned long long *)arguments[0]);
  show_parameters(config, f, arguments);
  fflush(stdout);
  return CUDA_SUCCESS;
}
