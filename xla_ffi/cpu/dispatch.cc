#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace qlora_jax {
namespace {

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
