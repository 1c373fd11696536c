"""The serving exam: any OpenAI-compatible engine, examined over HTTP. Nothing here needs torch but `reference`."""
