"""Back-end: engines on other machines that speak OpenAI's protocol."""
