"""Reading and writing models on disk: Hugging Face folders, PEFT adapters, safetensors."""
