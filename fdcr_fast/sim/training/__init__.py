"""How a model is trained, differentiated and evaluated; nothing here knows of clients or of attacks."""
