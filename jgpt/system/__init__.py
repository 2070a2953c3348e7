"""Files, locks, signals, memory and the cache folder; nothing here knows of GPTs."""
