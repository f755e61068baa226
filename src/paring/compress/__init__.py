"""The Compression API and the algorithms built on it; nothing here knows a file format."""
