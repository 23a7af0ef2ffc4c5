"""Identity providers: who somebody is, in the words of a service where they have an account. One class each."""
