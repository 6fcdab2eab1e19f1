"""Fine-tuning ImageNet backbones to recognise the emotion an image evokes.

The modules hold definitions only; importing one has no effect.
"""
