// The tables of the translation units, for dispatch.cc.
#pragma once

#include "kernels/kernels.h"

namespace edgert {

extern const KernelTable scalar_table;
extern const KernelTable portable_table;
extern const KernelTable avx2_table;       // x86-64
extern const KernelTable avxvnni_table;    // x86-64
extern const KernelTable avx512_table;     // x86-64
extern const KernelTable neon_table;       // aarch64
extern const KernelTable neon_i8mm_table;  // aarch64

}  // namespace edgert
