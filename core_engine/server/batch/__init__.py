"""Files of requests, as OpenAI's batches have them, answered by the application of a server."""
