"""Networks that generate images, sounds and vectors."""

import generative_autoregressive
import generative_latent

ARCHITECTURES = {**generative_latent.ARCHITECTURES, **generative_autoregressive.ARCHITECTURES}
