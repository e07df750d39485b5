"""The models: GPT and ViT, on one transformer, and published weights for both."""
