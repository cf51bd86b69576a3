"""What training codes do around their mixture-of-experts layers, one file or a few for each.

`llmfoundry` builds and initialises the feed-forward blocks `mb_moe` and `mb_dmoe` of llm-foundry; `olmoe` turns OLMoE's
configuration into a layer's and has its losses, parameter groups and counts. Both stand on `dmoe.compat.megablocks` and
import nothing of those codes. `megatron` and the files beside it are a layer for Megatron-core, `transformers` and
those beside it compute the experts of transformers' models.
"""
