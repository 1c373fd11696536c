"""The exam of the links: several processes, their collectives and what lies between them."""
