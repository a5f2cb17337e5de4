"""Rules by primitive family; importing this package registers them all."""

import passes.rules.attention
import passes.rules.contraction
import passes.rules.control_flow
import passes.rules.convolution
import passes.rules.elementwise
import passes.rules.indexing
import passes.rules.linalg
import passes.rules.ragged
import passes.rules.random
import passes.rules.reduction
import passes.rules.shape
import passes.rules.sorting
import passes.rules.windows  # noqa: F401
