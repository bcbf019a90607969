// float16 for g++: bits, and conversions that round to nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const uint32_t sign = (uint32_t)(value.bits & 0x8000u) << 16;
  const int exponent = value.bits >> 10 & 31;
  const uint32_t fraction = value.bits & 0x3ffu;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction ? NAN : INFINITY;
  } else {
    const int scale = exponent == 0 ? -24 : exponent - 25;
    magnitude = std::ldexp((float)(exponent == 0 ? fraction : fraction | 0x400u), scale);
  }
  uint32_t bits;
  std::memcpy(&bits, &magnitude, 4);
  bits |= sign;
  std::memcpy(&magnitude, &bits, 4);
  return magnitude;
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000u : 0;
  const float magnitude = std::fabs(value);
  if (magnitude != magnitude) return {(uint16_t)(sign | 0x7e00u)};
  if (magnitude == 0) return {sign};
  if (magnitude >= 65520.0f) return {(uint16_t)(sign | 0x7c00u)};
  int exponent;
  std::frexp(magnitude, &exponent);                         // magnitude < 2^exponent
  const int last = (exponent < -13 ? -13 : exponent) - 11;  // exponent of the last bit
  const float units = std::nearbyint(std::ldexp(magnitude, -last));
  // In units of the last bit: 1024 and more are normal numbers, and a carry moves the exponent.
  const uint32_t bits = ((uint32_t)(last + 24) << 10) + (uint32_t)units;
  return {(uint16_t)(sign | bits)};
}
