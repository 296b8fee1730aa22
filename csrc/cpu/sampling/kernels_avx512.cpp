// Compiled with -mavx512{f,bw,vl,dq}; called only where dispatch.cpp found all four.
#include "cpu/sampling/kernels_impl.h"
