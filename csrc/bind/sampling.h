// The operators of sampling and of speculative verification, over what a device has for them:
//
//   type()                                       of its tensors, as the shim numbers it
//   top_k_renorm(device, rows, top_k, out), …    a function for each operator, which returns when that is done or
//                                                launched, and throws if it cannot be
#pragma once

#include <torch/csrc/stable/library.h>

#include "bind/sampling_arguments.h"

namespace fusedcomm {

template <class Device>
struct SamplingOperators {
  using Given = sampling::Given;
  using Limit = sampling::LimitGiven;
  using Number = sampling::NumberGiven;
  using Optional = sampling::Optional;
  using Rows = sampling::Rows;
  using Source = sampling::Source;

  static void top_k_renorm_probs_out(Handle probs_given, Optional indices, Optional top_k_given, int64_t top_k_value,
                                     Handle out_given) {
    const Source probs(probs_given, indices);
    const Limit top_k(top_k_given, top_k_value);
    const Given out(out_given);
    const Rows rows = probs.rows(Device::type());
    Device::top_k_renorm(probs.device(), rows, top_k.of(probs, rows), probabilities(out, probs, rows));
  }

  static void top_p_renorm_probs_out(Handle probs_given, Optional indices, Optional top_p_given, double top_p_value,
                                     Handle out_given) {
    const Source probs(probs_given, indices);
    const Number top_p(top_p_given, top_p_value);
    const Given out(out_given);
    const Rows rows = probs.rows(Device::type());
    Device::top_p_renorm(probs.device(), rows, top_p.of(probs, rows), probabilities(out, probs, rows));
  }

  static void top_k_top_p_renorm_probs_out(Handle probs_given, Optional indices, Optional top_k_given,
                                           int64_t top_k_value, Optional top_p_given, double top_p_value,
                                           Handle out_given) {
    const Source probs(probs_given, indices);
    const Limit top_k(top_k_given, top_k_value);
    const Number top_p(top_p_given, top_p_value);
    const Given out(out_given);
    const Rows rows = probs.rows(Device::type());
    Device::top_k_top_p_renorm(probs.device(), rows, top_k.of(probs, rows), top_p.of(probs, rows),
                               probabilities(out, probs, rows));
  }

  static void min_p_renorm_probs_out(Handle probs_given, Optional indices, Optional min_p_given, double min_p_value,
                                     Handle out_given) {
    const Source probs(probs_given, indices);
    const Number min_p(min_p_given, min_p_value);
    const Given out(out_given);
    const Rows rows = probs.rows(Device::type());
    Device::min_p_renorm(probs.device(), rows, min_p.of(probs, rows), probabilities(out, probs, rows));
  }

  static void softmax_temperature_out(Handle logits_given, Optional indices, Optional temperature_given,
                                      double temperature_value, Handle out_given) {
    const Source logits(logits_given, indices);
    const Number temperature(temperature_given, temperature_value);
    const Given out(out_given);
    const Rows rows = logits.rows(Device::type());
    Device::softmax_temperature(logits.device(), rows, temperature.of(logits, rows), probabilities(out, logits, rows));
  }

  static void sampling_from_probs_out(Handle probs_given, Optional indices, Handle uniforms_given, Handle out_given) {
    const Source probs(probs_given, indices);
    const Number uniforms(uniforms_given, 0.0);
    const Given out(out_given);
    const Rows rows = probs.rows(Device::type());
    Device::sample(probs.device(), rows, uniforms.of(probs, rows).rows, tokens(out, probs, rows));
  }

  static void top_k_top_p_sampling_from_probs_out(Handle probs_given, Optional indices, Optional top_k_given,
                                                  int64_t top_k_value, Optional top_p_given, double top_p_value,
                                                  Handle uniforms_given, bool joint, Handle out_given) {
    const Source probs(probs_given, indices);
    const Limit top_k(top_k_given, top_k_value);
    const Number top_p(top_p_given, top_p_value), uniforms(uniforms_given, 0.0);
    const Given out(out_given);
    const Rows rows = probs.rows(Device::type());
    Device::sample_top_k_top_p(probs.device(), rows, top_k.of(probs, rows), top_p.of(probs, rows),
                               uniforms.of(probs, rows).rows, joint, tokens(out, probs, rows));
  }

  static void chain_speculative_sampling_out(Handle draft_probs_given, Handle draft_ids_given,
                                             Handle target_probs_given, Handle uniforms_given,
                                             Handle final_uniforms_given, Handle output_ids_given,
                                             Handle accepted_given) {
    const Given draft_probs(draft_probs_given), draft_ids(draft_ids_given), target_probs(target_probs_given);
    const Given uniforms(uniforms_given), final_uniforms(final_uniforms_given);
    const Given output_ids(output_ids_given), accepted(accepted_given);
    const sampling::Block block(target_probs, 1, Device::type());
    const int64_t batch = block.batch, n = block.size - 1;
    sampling::ChainArguments a;
    a.draft_probs = block.floats(draft_probs, batch * n * block.vocab);
    a.draft_ids = block.integers(draft_ids, batch * n);
    a.target_probs = target_probs.data<float>();
    a.uniforms = block.floats(uniforms, batch * n);
    a.final_uniforms = block.floats(final_uniforms, batch);
    a.output_ids = block.written32(output_ids, batch * (n + 1));
    a.accepted = block.written32(accepted, batch);
    a.batch = batch;
    a.num_drafts = int32_t(n);
    a.vocab = block.vocab;
    Device::chain_speculative_sampling(target_probs.view().device, a);
  }

  static void dflash_chain_verify_out(Handle candidates_given, Handle target_probs_given, Handle uniforms_given,
                                      Handle final_uniforms_given, double threshold_single, double threshold_acc,
                                      Handle accept_len_given, Handle bonus_given, Handle tokens_given) {
    const Given candidates(candidates_given), target_probs(target_probs_given), uniforms(uniforms_given);
    const Given final_uniforms(final_uniforms_given);
    const Given accept_len(accept_len_given), bonus(bonus_given), tokens(tokens_given);
    const sampling::Block block(target_probs, 1, Device::type());
    const int64_t nodes = block.batch * block.size;
    sampling::BlockArguments a;
    a.candidates = block.wide(candidates, nodes);
    a.target_probs = target_probs.data<float>();
    a.uniforms = block.floats(uniforms, nodes);
    a.final_uniforms = block.floats(final_uniforms, block.batch);
    a.threshold_single = float(threshold_single);
    a.threshold_acc = float(threshold_acc);
    a.out = block.verified(accept_len, bonus, tokens);
    a.batch = block.batch;
    a.size = block.size;
    a.vocab = block.vocab;
    Device::dflash_chain_verify(target_probs.view().device, a);
  }

  static void greedy_chain_verify_out(Handle candidates_given, Handle target_predict_given, Handle accept_len_given,
                                      Handle bonus_given, Handle tokens_given) {
    const Given candidates(candidates_given), target_predict(target_predict_given);
    const Given accept_len(accept_len_given), bonus(bonus_given), tokens(tokens_given);
    const sampling::Block block(candidates, 0, Device::type());
    const int64_t nodes = block.batch * block.size;
    sampling::GreedyArguments a;
    a.candidates = block.integers(candidates, nodes);
    a.target_predict = block.integers(target_predict, nodes);
    a.out = block.verified(accept_len, bonus, tokens);
    a.batch = block.batch;
    a.size = block.size;
    Device::greedy_chain_verify(candidates.view().device, a);
  }

  static void tree_speculative_sampling_target_only(Handle predicts_given, Handle accept_index_given,
                                                    Handle accept_token_num_given, Handle candidates_given,
                                                    Handle retrive_index_given, Handle retrive_next_token_given,
                                                    Handle retrive_next_sibling_given, Handle uniforms_given,
                                                    Handle final_uniforms_given, Handle target_probs_given,
                                                    Handle draft_probs_given, double threshold_single,
                                                    double threshold_acc) {
    const Given predicts(predicts_given), accept_index(accept_index_given), accept_token_num(accept_token_num_given);
    const Given candidates(candidates_given), retrive_index(retrive_index_given);
    const Given next_token(retrive_next_token_given), next_sibling(retrive_next_sibling_given);
    const Given uniforms(uniforms_given), final_uniforms(final_uniforms_given);
    const Given target_probs(target_probs_given), draft_probs(draft_probs_given);
    const sampling::Block block(target_probs, 1, Device::type());
    const int64_t nodes = block.batch * block.size, path_size = accept_index.view().dim == 2 ? accept_index.size(1) : 0;
    sampling::check(path_size >= 1 && path_size <= INT32_MAX, "accept_index: expected [bs, S >= 1]");
    sampling::TreeArguments a;
    a.predicts = block.written32(predicts, predicts.view().numel);
    a.accept_index = block.written32(accept_index, block.batch * path_size);
    a.accept_token_num = block.written32(accept_token_num, block.batch);
    a.candidates = block.wide(candidates, nodes);
    a.retrive_index = block.wide(retrive_index, nodes);
    a.retrive_next_token = block.wide(next_token, nodes);
    a.retrive_next_sibling = block.wide(next_sibling, nodes);
    a.uniforms = block.floats(uniforms, nodes);
    a.final_uniforms = block.floats(final_uniforms, block.batch);
    a.target_probs = target_probs.data<float>();
    (void)block.floats(draft_probs, nodes * block.vocab);
    a.draft_probs = draft_probs.written<float>();
    a.threshold_single = float(threshold_single);
    a.threshold_acc = float(threshold_acc);
    a.batch = block.batch;
    a.num_positions = predicts.view().numel;
    sampling::check(a.num_positions <= INT32_MAX, "predicts: expected less than 2^31 elements");
    a.size = block.size;
    a.path_size = int32_t(path_size);
    a.vocab = block.vocab;
    Device::tree_speculative_sampling(target_probs.view().device, a);
  }
};

template <class Device, class Library>
void implement_sampling(Library& m) {
  using Operators = SamplingOperators<Device>;
  m.impl("top_k_renorm_probs_out", TORCH_BOX(&Operators::top_k_renorm_probs_out));
  m.impl("top_p_renorm_probs_out", TORCH_BOX(&Operators::top_p_renorm_probs_out));
  m.impl("top_k_top_p_renorm_probs_out", TORCH_BOX(&Operators::top_k_top_p_renorm_probs_out));
  m.impl("min_p_renorm_probs_out", TORCH_BOX(&Operators::min_p_renorm_probs_out));
  m.impl("softmax_temperature_out", TORCH_BOX(&Operators::softmax_temperature_out));
  m.impl("sampling_from_probs_out", TORCH_BOX(&Operators::sampling_from_probs_out));
  m.impl("top_k_top_p_sampling_from_probs_out", TORCH_BOX(&Operators::top_k_top_p_sampling_from_probs_out));
  m.impl("chain_speculative_sampling_out", TORCH_BOX(&Operators::chain_speculative_sampling_out));
  m.impl("dflash_chain_verify_out", TORCH_BOX(&Operators::dflash_chain_verify_out));
  m.impl("greedy_chain_verify_out", TORCH_BOX(&Operators::greedy_chain_verify_out));
  m.impl("tree_speculative_sampling_target_only", TORCH_BOX(&Operators::tree_speculative_sampling_target_only));
}

}  // namespace fusedcomm
