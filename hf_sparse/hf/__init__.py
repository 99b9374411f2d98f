"""The seams to Hugging Face: the only floor that imports transformers, accelerate, huggingface_hub and peft."""
