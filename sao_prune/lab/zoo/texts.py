"""What the page of the zoo explains."""

from __future__ import annotations

RUN_TITLES = {
    "timm": "One model of each timm family, and timm's test models",
    "torchvision": "torchvision's classification models",
    "transformers": "One model of each transformers family",
}
PLANNED = """Each architecture is built on the meta device, without memory for its weights, and given to
`sao_prune.plan`. Beside an exception these count as failures: a parameter that is pruned twice, a pruned classifier
(found by building the model for 997 classes), and a pruned convolution with three input channels. Sets are even where
the number of groups divides both sides of the weight. A layer narrower than the number of groups gets as many groups as
it can have, and so misses the requested sparsity. Weights in no known layer are tables of positions, tokens and scales,
and the experts of `efficientnet_cc_*`'s conditional convolutions."""

FAMILIES = """Of transformers it is one model a family, a causal language model where there is one, from the family's
default configuration with 64 channels, 2 layers, 4 heads and experts, and 96 words. A family is left out, with the
reason, where that builds no model, where the model still has over 4 million parameters, or where it does not run on
tokens, an image or a sound alone."""

RUN = """Each model runs in a process of its own, on one CPU thread, with {batch} random images of the smallest size
of 64, 96, .. 256 that the architecture takes, else of its own size; those of transformers with {batch} rows of tokens,
images or sounds. The stages:

1. a forward and backward pass of the dense model: which weights get a gradient;
2. `sao_prune.apply`;
3. two training steps (SGD, weight decay 0.1): every pruned weight that had a gradient has one, and changes; masked
   entries of the weight in use are zero; masks have the reported number of ones; nothing but a linear, convolution,
   attention or recurrent function reads a masked weight, so none is transformed on the way;
4. `copy.deepcopy`: equal outputs; training the copy leaves the original as it is;
5. `sao_prune.compact` on a copy, with the input as its example: equal outputs, and gradients that agree to 5 % of
   their norm;
6. `sao_prune.remove`: zeros stay, equal outputs;
7. `sao_prune.save` before and after `remove`; `sao_prune.load` of the one after into a fresh dense model, then of the
   one before into that: equal outputs each time.

Outputs are equal if they differ by no more than 1e-5 of the largest; those of a compact model may do so in double
precision where the network magnifies what single precision rounds off, and its gradients may then lie as far again
from those in double precision as the original's do, if in double precision they agree to 1e-6 of their norm.
Memory is the peak of the whole process, of which Python and the libraries take about 0.4 GiB."""
