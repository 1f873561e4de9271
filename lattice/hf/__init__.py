"""In and out of the Hugging Face ecosystem; see docs/huggingface.md."""
