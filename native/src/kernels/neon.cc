// AArch64 with the dot-product extension.
#include "kernels/neon.h"

namespace edgert {

constinit const KernelTable neon_table = table_of<Neon>("neon");

}  // namespace edgert
