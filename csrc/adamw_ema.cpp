// The host build: what the GPU does, in loops over its thread blocks and lanes. For tests, so it also counts its traffic with memory.
#define VAVAE_COUNT_TRAFFIC
#include "adamw_ema.h"

using namespace vavae;

// As in adamw_ema.cu. Returns 0, or 1 where that returns cudaErrorInvalidValue.
extern "C" int vavae_adamw_ema(const AdamwTensor* rows, int64_t count, const AdamwSettings* settings, int param_type, int grad_type, int,
                               void*) {
  AdamwTable table;
  return with_storage(param_type, [&](auto param) {
    return with_storage(grad_type, [&](auto grad) {
      for (int64_t done = 0; done < count;) {
        const int64_t taken = fill(table, rows + done, count - done, *settings);
        if (taken == 0) return false;
        done += taken;
        for (int chunk = 0; chunk < table.first_chunk[table.count]; chunk++)
          for (int lane = 0; lane < kThreads; lane++) block<decltype(param), decltype(grad)>(table, chunk, lane, kThreads);
        for (int row = 0; row < table.count; row++) count_step(table, row);
      }
      return true;
    });
  }) ? 0 : 1;
}

// The traffic since the last call.
extern "C" void vavae_traffic(Traffic* since) {
  *since = traffic;
  traffic = {};
}

// fp32 -> storage type -> fp32, element by element: tests hold the conversions beside PyTorch's.
extern "C" int vavae_round(const float* from, float* to, int64_t count, int type) {
  return with_storage(type, [&](auto storage) {
    for (int64_t i = 0; i < count; i++) to[i] = widen(narrow<decltype(storage)>(from[i]));
    return true;
  }) ? 0 : 1;
}
