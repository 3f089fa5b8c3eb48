#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef QLORA_JAX_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qlora_jax {
namespace {

#ifdef QLORA_JAX_AMX
// Whether processor and kernel have AMX with BF16, and the kernel lets this process use it: tile registers enlarge what
// a signal saves, so Linux wants to be asked once a process (Documentation/arch/x86/xstate.rst).
bool MayUseTiles() {
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kTileBits = 1u << 24 | 1u << 22;  // AMX-TILE and AMX-BF16
  if ((edx & kTileBits) != kTileBits) return false;
  constexpr unsigned kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Candidate {
  std::string name;  // the value of QLORA_JAX_ISA
  bool eligible;
  const InstructionSet& (*get)();
};

// From the slowest to the fastest; those that this machine lacks, or runs no faster, are not eligible.
std::vector<Candidate> Candidates() {
  std::vector<Candidate> candidates = {{"portable", true, Portable}};
#ifdef QLORA_JAX_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  candidates.push_back({"avx2", avx2, Avx2});
  candidates.push_back({"avx512", avx512, Avx512});
  // Multiplying pairs of bfloat16 doubles the products on AMD (measured on Zen 5: 0.48 against 0.25 TFLOP/s a core),
  // and halves them on Intel (Sapphire Rapids: 0.10 against 0.21).
  const bool fast_pairs = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
  candidates.push_back({"avx512_bf16", avx512 && fast_pairs, Avx512Bf16});
  // For tests: it is slow, so only who asks for it gets it.
  const char* cap = std::getenv("QLORA_JAX_ISA");
  candidates.push_back({"amx_model", avx512 && cap != nullptr && cap == std::string("amx_model"), AmxModel});
#ifdef QLORA_JAX_AMX
  candidates.push_back({"amx",
                        avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
                            MayUseTiles(),
                        Amx});
#endif
#endif
  return candidates;
}

const InstructionSet& Choose() {
  const char* cap = std::getenv("QLORA_JAX_ISA");
  const InstructionSet* best = nullptr;
  std::string names;
  for (const Candidate& candidate : Candidates()) {
    if (candidate.eligible) best = &candidate.get();
    if (cap == nullptr) continue;
    if (candidate.name == cap) return *best;
    names += (names.empty() ? "" : ", ") + candidate.name;
  }
  if (cap != nullptr) {
    throw std::invalid_argument("QLORA_JAX_ISA must be one of " + names + "; got \"" + cap + "\"");
  }
  return *best;
}

}  // namespace

const InstructionSet& BestInstructionSet() {
  static const InstructionSet& best = Choose();
  return best;
}

}  // namespace qlora_jax
