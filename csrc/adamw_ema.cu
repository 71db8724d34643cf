// The device build: one launch a table over the chunks of its tensors, then one that counts their steps.
#include <cuda_runtime.h>

#include "adamw_ema.h"

using namespace vavae;

namespace {

template <typename P, typename G>
__global__ void __launch_bounds__(kThreads, 3) adamw_ema_kernel(const __grid_constant__ AdamwTable table) {
  block<P, G>(table, blockIdx.x, threadIdx.x, kThreads);
}

__global__ void __launch_bounds__(kThreads) adamw_ema_count_kernel(const __grid_constant__ AdamwTable table) {
  count_step(table, blockIdx.x * kThreads + threadIdx.x);
}

cudaError_t launch(const void* kernel, int blocks, AdamwTable& table, cudaStream_t stream) {
  void* arguments[] = {&table};  // copied before the call returns
  return blocks == 0 ? cudaSuccess : cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), arguments, 0, stream);
}

// Calls call(kernel) with the kernel of two storage types.
template <typename Call>
cudaError_t with_kernel(int param_type, int grad_type, Call call) {
  cudaError_t error = cudaErrorInvalidValue;
  with_storage(param_type, [&](auto param) {
    return with_storage(grad_type, [&](auto grad) {
      error = call(reinterpret_cast<const void*>(adamw_ema_kernel<decltype(param), decltype(grad)>));
      return true;
    });
  });
  return error;
}

cudaError_t load_kernel(const void* kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

}  // namespace

// Loads every kernel on `device`, so that the first step may be one that a CUDA graph captures. Returns a cudaError_t.
extern "C" int vavae_adamw_ema_prepare(int device) {
  int driver = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess && driver < 12010) error = cudaErrorInsufficientDriver;  // 32,764 bytes of arguments
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = load_kernel(reinterpret_cast<const void*>(adamw_ema_count_kernel));
  for (int types = 0; types < 9 && error == cudaSuccess; types++) error = with_kernel(types / 3, types % 3, load_kernel);
  return error;
}

// One step of `count` rows of one pair of storage types, in order on `stream` of `device`. Returns a cudaError_t; waits for nothing.
extern "C" int vavae_adamw_ema(const AdamwTensor* rows, int64_t count, const AdamwSettings* settings, int param_type, int grad_type, int device,
                               void* stream) {
  cudaError_t error = cudaSetDevice(device);
  AdamwTable table;
  for (int64_t done = 0; done < count && error == cudaSuccess;) {
    const int64_t taken = fill(table, rows + done, count - done, *settings);
    if (taken == 0) return cudaErrorInvalidValue;
    done += taken;
    error = with_kernel(param_type, grad_type, [&](const void* kernel) {
      return launch(kernel, table.first_chunk[table.count], table, static_cast<cudaStream_t>(stream));
    });
    if (error == cudaSuccess)
      error = launch(reinterpret_cast<const void*>(adamw_ema_count_kernel), (table.count + kThreads - 1) / kThreads, table,
                     static_cast<cudaStream_t>(stream));
  }
  return error;
}

extern "C" const char* vavae_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
