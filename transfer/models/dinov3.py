"""A DINOv3 ViT with a classification head, which transformers does not provide.

`save_pretrained` copies this file beside the weights (`auto_map` in config.json), so the model loads anywhere with
`trust_remote_code=True`. Therefore it must not import anything from this project.
"""

import torch
from torch import nn
from transformers import AutoModelForImageClassification, DINOv3ViTConfig, DINOv3ViTModel
from transformers.modeling_outputs import ImageClassifierOutput


class DINOv3ViTForImageClassification(DINOv3ViTModel):
    """Logits from the class token and the mean of the patch tokens, as in transformers' DINOv2 classifier."""

    def __init__(self, config: DINOv3ViTConfig):
        super().__init__(config)
        assert config.num_labels is not None  # transformers sets two labels where a config has none
        self.num_labels = config.num_labels
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        outputs = super().forward(pixel_values, **kwargs)
        tokens = outputs.last_hidden_state  # (B, 1 + registers + patches, D)
        patches = tokens[:, 1 + self.config.num_register_tokens :]
        logits = self.classifier(torch.cat([tokens[:, 0], patches.mean(1)], dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


DINOv3ViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
AutoModelForImageClassification.register(DINOv3ViTConfig, DINOv3ViTForImageClassification, exist_ok=True)
