// Numbers as they lie in memory (fp32, bf16, fp16) and as kernels compute with them (fp32), and the one way to memory: load and store.
//
// Host and device builds share every line but two: on a GPU the hardware converts fp16.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define VAVAE_INLINE __host__ __device__ __forceinline__
#else
#define VAVAE_INLINE inline
#endif

namespace vavae {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

VAVAE_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

VAVAE_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

VAVAE_INLINE float widen(float x) { return x; }

VAVAE_INLINE float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

VAVAE_INLINE float widen(fp16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  if (exponent == 0) return float_of(sign | bits_of(float(fraction) * 0x1p-24f));  // zero and subnormals
  if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);         // infinity and NaN
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
#endif
}

// fp32 rounded to the nearest number of T, ties to even.
template <typename T>
VAVAE_INLINE T narrow(float x);

template <>
VAVAE_INLINE float narrow<float>(float x) {
  return x;
}

template <>
VAVAE_INLINE bf16 narrow<bf16>(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(0x7fc0)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
VAVAE_INLINE fp16 narrow<fp16>(float x) {
#ifdef __CUDA_ARCH__
  fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, size = bits_of(x) & 0x7fffffff;
  if (size > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (size >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more round to infinity
  if (size < 0x38800000) return {uint16_t(sign | uint32_t(rintf(float_of(size) * 0x1p24f)))};
  return {uint16_t(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13)};
#endif
}

// What went through load and store: the host build counts it, so that tests read bytes and alignment off the code that runs.
struct Traffic {
  int64_t read, written;  // bytes
  int64_t vectors;        // accesses of more than one element
  int64_t misaligned;     // accesses that a GPU would refuse
};

#ifdef VAVAE_COUNT_TRAFFIC
inline Traffic traffic = {};

template <typename T>
void count(const T* address, int elements, int64_t& bytes) {
  bytes += sizeof(T);
  traffic.vectors += elements > 1;
  traffic.misaligned += reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0;
}
#define VAVAE_COUNT(address, elements, bytes) count(address, elements, traffic.bytes)
#else
#define VAVAE_COUNT(address, elements, bytes)
#endif

// N neighbours of T, moved by one instruction: 16 bytes for N = 4 in fp32.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  T at[N];
};

template <typename T, int N>
VAVAE_INLINE void load(const T* from, float (&to)[N]) {
  const auto* address = reinterpret_cast<const Vector<T, N>*>(from);
  VAVAE_COUNT(address, N, read);
  const Vector<T, N> loaded = *address;
  for (int i = 0; i < N; i++) to[i] = widen(loaded.at[i]);
}

template <typename T, int N>
VAVAE_INLINE void store(T* to, const float (&from)[N]) {
  Vector<T, N> stored;
  for (int i = 0; i < N; i++) stored.at[i] = narrow<T>(from[i]);
  auto* address = reinterpret_cast<Vector<T, N>*>(to);
  VAVAE_COUNT(address, N, written);
  *address = stored;
}

template <int N, typename T>
VAVAE_INLINE bool aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % (N * sizeof(T)) == 0;
}

}  // namespace vavae
