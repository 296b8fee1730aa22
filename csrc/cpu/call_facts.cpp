#include "cpu/call_facts.h"

namespace fusedcomm::cpu {
namespace {

const char* op_name(Op op) {
  switch (op) {
    case Op::kNone:
      return "nothing";
    case Op::kAllReduce:
      return "all_reduce";
    case Op::kAllReduceRMSNorm:
      return "allreduce_rmsnorm";
    case Op::kAllReduceRMSNormQuant:
      return "allreduce_rmsnorm_quant";
    case Op::kAllGather:
      return "all_gather";
    case Op::kReduceScatter:
      return "reduce_scatter";
    case Op::kBroadcast:
      return "broadcast";
    case Op::kBarrier:
      return "barrier";
  }
  return "unknown";
}

}  // namespace

std::string describe(const CallFacts& f) {
  static const char* const kDTypes[] = {"bfloat16", "float16", "float32", "bytes"};
  std::string text = op_name(f.op);
  if (f.op == Op::kBarrier || f.op == Op::kNone) return text;
  text +=
      std::string("(") + kDTypes[f.dtype & 3] + " [" + std::to_string(f.rows) + ", " + std::to_string(f.hidden) + "]";
  if (f.op == Op::kAllReduceRMSNormQuant) text += ", group_size=" + std::to_string(f.option);
  if (f.op == Op::kBroadcast) text += ", src=" + std::to_string(f.option);
  return text + ")";
}

bool same(const CallFacts& a, const CallFacts& b) {
  return a.op == b.op && a.dtype == b.dtype && a.rows == b.rows && a.hidden == b.hidden && a.option == b.option;
}

uint32_t hash(const CallFacts& f) {
  uint64_t h = 0xcbf29ce484222325u;
  for (const uint64_t word :
       {uint64_t(f.op), uint64_t(f.dtype), uint64_t(f.rows), uint64_t(f.hidden), uint64_t(f.option)}) {
    h = (h ^ word) * 0x9e3779b97f4a7c15u;
    h ^= h >> 29;
  }
  return uint32_t(h >> 32);
}

}  // namespace fusedcomm::cpu
