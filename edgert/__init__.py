"""edgert runs mixture-of-experts language models that are larger than the memory they are given."""
