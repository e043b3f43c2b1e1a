"""Networks of images: [N, H, W, C]."""

import vision_dense
import vision_gated
import vision_mobile
import vision_patches
import vision_plain
import vision_residual

ARCHITECTURES = {
    **vision_plain.ARCHITECTURES,
    **vision_residual.ARCHITECTURES,
    **vision_gated.ARCHITECTURES,
    **vision_mobile.ARCHITECTURES,
    **vision_dense.ARCHITECTURES,
    **vision_patches.ARCHITECTURES,
}
