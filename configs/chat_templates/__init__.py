"""LLaVA's and Qwen's prompts by name; a package so that they are found wherever it is installed."""
