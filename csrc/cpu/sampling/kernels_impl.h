// The table of these kernels, compiled for each instruction set by sampling/kernels_*.cpp.
#pragma once

#include "cpu/sampling/draw.h"
#include "cpu/sampling/filters.h"
#include "cpu/sampling/softmax.h"
#include "cpu/sampling/verify.h"

namespace fusedcomm::FUSEDCOMM_ISA::sampling {

template <class T>
constexpr RowKernels make_row_kernels() {
  return {&top_k_renorm<T>,        &top_p_renorm<T>, &top_k_top_p_renorm<T>, &min_p_renorm<T>,
          &softmax_temperature<T>, &sample<T>,       &sample_top_k_top_p<T>};
}

#define FUSEDCOMM_STRINGIZE_(x) #x
#define FUSEDCOMM_STRINGIZE(x) FUSEDCOMM_STRINGIZE_(x)

extern const Kernels kKernels;
const Kernels kKernels = {
    FUSEDCOMM_STRINGIZE(FUSEDCOMM_ISA),
    {make_row_kernels<BFloat16>(), make_row_kernels<Half>(), make_row_kernels<float>()},
    &chain_speculative_sampling,
    &dflash_chain_verify,
    &greedy_chain_verify,
    &tree_speculative_sampling,
};

}  // namespace fusedcomm::FUSEDCOMM_ISA::sampling
