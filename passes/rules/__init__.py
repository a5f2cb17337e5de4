"""Rules by primitive family; importing this package registers them all."""

import passes.rules.contraction
import passes.rules.control_flow
import passes.rules.elementwise
import passes.rules.random
import passes.rules.reduction
import passes.rules.shape  # noqa: F401
