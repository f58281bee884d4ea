"""The Hugging Face store: repositories of a hub, each file read at one commit; the only home of huggingface_hub."""
