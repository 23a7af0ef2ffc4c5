"""PostgreSQL: the schema, the way there from Trio, and every query of the product."""
