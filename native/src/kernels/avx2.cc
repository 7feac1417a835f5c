// AVX2, FMA and F16C.
#include "kernels/avx2.h"

namespace edgert {

constinit const KernelTable avx2_table = table_of<Avx2>("avx2");

}  // namespace edgert
