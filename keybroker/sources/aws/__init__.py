"""AWS Secrets Manager: who we are there, what is kept, how it is read and published."""
