// Which vector instructions to use, decided when the program runs, so that one wheel serves every machine.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#define SENSILORA_X86 1
#define SENSILORA_AVX2_FEATURES "avx2,fma,f16c"
#define SENSILORA_AVX512_FEATURES SENSILORA_AVX2_FEATURES ",avx512f,avx512bw,avx512dq,avx512vl"
#define SENSILORA_AVX2 __attribute__((target(SENSILORA_AVX2_FEATURES)))
#define SENSILORA_AVX512 __attribute__((target(SENSILORA_AVX512_FEATURES)))
#define SENSILORA_AVX512BF16 __attribute__((target(SENSILORA_AVX512_FEATURES ",avx512bf16")))
#else
#define SENSILORA_X86 0
#endif

// An instruction-set specific caller can only inline what is marked so.
#define SENSILORA_INLINE __attribute__((always_inline)) inline

namespace sensilora {

enum class CpuLevel { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The best level of this machine, or a lower one named by SENSILORA_CPU (baseline, avx2, avx512, avx512bf16).
CpuLevel cpu_level();
const char* cpu_level_name();

#if SENSILORA_X86
template <class Body, class... Args>
SENSILORA_AVX512 void run_avx512(Args... args) {
  Body::template run<64>(args...);
}
template <class Body, class... Args>
SENSILORA_AVX2 void run_avx2(Args... args) {
  Body::template run<32>(args...);
}
#endif

// Calls Body::run<bytes in a vector>(args...), compiled for the level of this machine. `run` must be SENSILORA_INLINE.
template <class Body, class... Args>
void dispatch(Args... args) {
#if SENSILORA_X86
  if (cpu_level() >= CpuLevel::kAvx512) return run_avx512<Body>(args...);
  if (cpu_level() == CpuLevel::kAvx2) return run_avx2<Body>(args...);
#endif
  Body::template run<16>(args...);
}

}  // namespace sensilora
