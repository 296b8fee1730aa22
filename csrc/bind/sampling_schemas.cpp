// The schemas of the operators of sampling and of speculative verification; devices implement them with
// bind/sampling.h.
#include <torch/csrc/stable/library.h>

namespace fusedcomm {

namespace {

// Signatures are those of fusedcomm/ops/sampling/reference.py and fusedcomm/ops/speculative/reference.py. A parameter
// is a tensor, a value a row, or the number beside it.
STABLE_TORCH_LIBRARY_FRAGMENT(fusedcomm, m) {
  m.def("top_k_renorm_probs_out(Tensor probs, Tensor? indices, Tensor? top_k, int top_k_value, Tensor(a!) out) -> ()");
  m.def(
      "top_p_renorm_probs_out(Tensor probs, Tensor? indices, Tensor? top_p, float top_p_value, Tensor(a!) out) -> ()");
  m.def(
      "top_k_top_p_renorm_probs_out(Tensor probs, Tensor? indices, Tensor? top_k, int top_k_value, Tensor? top_p, "
      "float top_p_value, Tensor(a!) out) -> ()");
  m.def(
      "min_p_renorm_probs_out(Tensor probs, Tensor? indices, Tensor? min_p, float min_p_value, Tensor(a!) out) -> ()");
  m.def(
      "softmax_temperature_out(Tensor logits, Tensor? indices, Tensor? temperature, float temperature_value, "
      "Tensor(a!) out) -> ()");
  m.def("sampling_from_probs_out(Tensor probs, Tensor? indices, Tensor uniforms, Tensor(a!) out) -> ()");
  m.def(
      "top_k_top_p_sampling_from_probs_out(Tensor probs, Tensor? indices, Tensor? top_k, int top_k_value, "
      "Tensor? top_p, float top_p_value, Tensor uniforms, bool joint, Tensor(a!) out) -> ()");

  m.def(
      "chain_speculative_sampling_out(Tensor draft_probs, Tensor draft_ids, Tensor target_probs, Tensor uniforms, "
      "Tensor final_uniforms, Tensor(a!) output_ids, Tensor(b!) accepted) -> ()");
  m.def(
      "dflash_chain_verify_out(Tensor candidates, Tensor target_probs, Tensor uniforms, Tensor final_uniforms, "
      "float threshold_single, float threshold_acc, Tensor(a!) accept_len, Tensor(b!) bonus, Tensor(c!) tokens) -> ()");
  m.def(
      "greedy_chain_verify_out(Tensor candidates, Tensor target_predict, Tensor(a!) accept_len, Tensor(b!) bonus, "
      "Tensor(c!) tokens) -> ()");
  m.def(
      "tree_speculative_sampling_target_only(Tensor(a!) predicts, Tensor(b!) accept_index, "
      "Tensor(c!) accept_token_num, Tensor candidates, Tensor retrive_index, Tensor retrive_next_token, "
      "Tensor retrive_next_sibling, Tensor uniform_samples, Tensor uniform_samples_for_final_sampling, "
      "Tensor target_probs, Tensor(d!) draft_probs, float threshold_single, float threshold_acc) -> ()");
}

}  // namespace
}  // namespace fusedcomm
