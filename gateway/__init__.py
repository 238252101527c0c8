"""Other protocols in front of a running container: LMTP over WebSocket, OpenAI's API, a page for the browser.

The gateway speaks only HTTP to its target. It never loads a model, and it imports nothing of the engine.
"""
