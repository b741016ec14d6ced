// Compiled, never run: a declaration of ours that differs from torch's own is an error here.
#define USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include "../../csrc/torch/stable_abi_cuda.h"
