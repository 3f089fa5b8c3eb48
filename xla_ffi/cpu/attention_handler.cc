#include "attention_handler.h"

#include <algorithm>
#include <cstdint>
#include <new>
#include <string>

#include "../operands.h"
#include "attention.h"
#include "dispatch.h"
#include "parallel.h"
#include "workspace.h"
#include "xla/ffi/api/ffi.h"

namespace qlora_jax {
namespace {

namespace ffi = xla::ffi;

struct Operands {
  ffi::AnyBuffer query, key, value, mask, normalizer, like_query[2], like_key[2];
};

ffi::Error Refuse(const std::string& message) { return ffi::Error::InvalidArgument("causal_attention: " + message); }

ffi::ErrorOr<AttentionProblem> Decode(const Operands& o, float scale) {
  const auto refuse = [](const std::string& message) { return ffi::Unexpected(Refuse(message)); };
  if (BestInstructionSet().attention == nullptr) {
    return refuse(std::string("there is no kernel for the instruction set ") + BestInstructionSet().name);
  }
  const auto dims = o.query.dimensions(), key_dims = o.key.dimensions();
  if (dims.size() != 4 || key_dims.size() != 4) {
    return refuse("query " + Shape(o.query) + " and key " + Shape(o.key) + " must have 4 dimensions");
  }
  AttentionProblem p{};
  p.batch = dims[0];
  p.seq = dims[1];
  p.heads = dims[2];
  p.kv_heads = key_dims[2];
  p.head_dim = dims[3];
  p.scale = scale;
  constexpr ffi::DataType kBfloat16 = ffi::DataType::BF16;
  const auto like_query = [&](const ffi::AnyBuffer& buffer) {
    return Has(buffer, kBfloat16, {p.batch, p.seq, p.heads, p.head_dim});
  };
  const auto like_key = [&](const ffi::AnyBuffer& buffer) {
    return Has(buffer, kBfloat16, {p.batch, p.seq, p.kv_heads, p.head_dim});
  };
  if (!like_query(o.query) || !like_query(o.like_query[0]) || !like_query(o.like_query[1]) || !like_key(o.key) ||
      !like_key(o.value) || !like_key(o.like_key[0]) || !like_key(o.like_key[1]) ||
      !Has(o.normalizer, ffi::DataType::F32, {p.batch, p.heads, p.seq})) {
    return refuse("query " + Shape(o.query) + ", key " + Shape(o.key) + ", value " + Shape(o.value) + ", normalizer " +
                  Shape(o.normalizer) + " and the results do not fit each other");
  }
  if (p.kv_heads == 0 ? p.heads != 0 : p.heads % p.kv_heads != 0) {
    return refuse(std::to_string(p.kv_heads) + " key/value heads do not divide " + std::to_string(p.heads) + " heads");
  }
  const bool masked = !Has(o.mask, ffi::DataType::PRED, {0});
  if (masked && !Has(o.mask, ffi::DataType::PRED, {p.batch, p.seq, p.seq})) {
    return refuse("mask " + Shape(o.mask) + " does not fit query " + Shape(o.query));
  }
  const auto data = [](const ffi::AnyBuffer& buffer) { return static_cast<uint16_t*>(buffer.untyped_data()); };
  p.query = data(o.query);
  p.key = data(o.key);
  p.value = data(o.value);
  p.mask = masked ? static_cast<const uint8_t*>(o.mask.untyped_data()) : nullptr;
  p.normalizer = o.normalizer.typed_data<float>();
  return p;
}

void RunForward(ffi::ThreadPool& pool, const AttentionProblem& p) {
  const AttentionKernels& kernels = *BestInstructionSet().attention;
  const int64_t threads = std::max<int64_t>(1, pool.num_threads()), kv_heads = p.batch * p.kv_heads;
  // Each part packs keys and values again, so there are more only where heads are few.
  const int64_t steps = (p.seq + kernels.query_step - 1) / kernels.query_step;
  const int64_t parts = std::clamp<int64_t>((2 * threads + kv_heads - 1) / kv_heads, 1, steps);
  const int64_t tasks = kv_heads * parts, workers = std::min(threads, tasks);
  const Workspace workspace(workers, kernels.forward_bytes(p));
  ForEach(pool, tasks, workers, [&](int64_t task, int64_t worker) {
    const int64_t part = task % parts;
    const int64_t begin = steps * part / parts * kernels.query_step;
    const int64_t end = std::min(steps * (part + 1) / parts * kernels.query_step, p.seq);
    kernels.forward(p, task / parts, begin, end, workspace.of(worker));
  });
}

void RunBackward(ffi::ThreadPool& pool, const AttentionProblem& p) {
  const AttentionKernels& kernels = *BestInstructionSet().attention;
  const int64_t tasks = p.batch * p.kv_heads;
  const int64_t workers = std::min<int64_t>(std::max<int64_t>(1, pool.num_threads()), tasks);
  const Workspace workspace(workers, kernels.backward_bytes(p));
  ForEach(pool, tasks, workers, [&](int64_t task, int64_t worker) {
    kernels.backward(p, task, workspace.of(worker));
  });
}

ffi::Error Run(ffi::ThreadPool& pool, const AttentionProblem& p, void (*run)(ffi::ThreadPool&, const AttentionProblem&)) {
  if (p.batch == 0 || p.seq == 0 || p.heads == 0 || p.head_dim == 0) return ffi::Error::Success();
  try {
    run(pool, p);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "causal_attention: no memory for the scores of " + std::to_string(p.seq) + " tokens");
  }
  return ffi::Error::Success();
}

ffi::Error Forward(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                   ffi::AnyBuffer mask, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> normalizer,
                   float scale) {
  ffi::ErrorOr<AttentionProblem> p = Decode({query, key, value, mask, *normalizer, {query, *y}, {key, value}}, scale);
  if (p.has_error()) return p.error();
  p->y = static_cast<uint16_t*>(y->untyped_data());
  return Run(pool, *p, RunForward);
}

ffi::Error Backward(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                    ffi::AnyBuffer mask, ffi::AnyBuffer normalizer, ffi::AnyBuffer dy,
                    ffi::Result<ffi::AnyBuffer> d_query, ffi::Result<ffi::AnyBuffer> d_key,
                    ffi::Result<ffi::AnyBuffer> d_value, float scale) {
  ffi::ErrorOr<AttentionProblem> p =
      Decode({query, key, value, mask, normalizer, {dy, *d_query}, {*d_key, *d_value}}, scale);
  if (p.has_error()) return p.error();
  p->dy = static_cast<const uint16_t*>(dy.untyped_data());
  p->d_query = static_cast<uint16_t*>(d_query->untyped_data());
  p->d_key = static_cast<uint16_t*>(d_key->untyped_data());
  p->d_value = static_cast<uint16_t*>(d_value->untyped_data());
  return Run(pool, *p, RunBackward);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(CausalAttention, Forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(CausalAttentionGradients, Backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale"));

}  // namespace qlora_jax
