"""The Hugging Face Hub: lookup, prefetch, repositories, push."""
