"""A runner keeps the streams' state and runs steps."""
