"""The namespace: directories and their listings, inodes, generations and permissions."""
