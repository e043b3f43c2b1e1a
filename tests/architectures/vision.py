"""Networks of images: [N, H, W, C]."""

import vision_plain
import vision_residual

ARCHITECTURES = {**vision_plain.ARCHITECTURES, **vision_residual.ARCHITECTURES}
