"""From dataset entries to the batches of a step; each line of this list needs only those above it.

rows        raw_records, json_values, json_rows, csv_rows, file_heads, unpacking, row_files: one file, row by row
            fetch, remote_files, folder_files, source_files: which files; table_rows, row_layouts: checks of rows
            sources (all rows of an entry), streaming_source (from any row on)
texts       formats, messages, chat_templates, template_sandbox, template_spans, chat_renderer, pretokenized
tokens      tokenizer, new_tokenizers, encoding, fastokens_backend, documents, token_store, token_store_writer
data sets   prepare, mixture, packing, prepared_data, cache (prepared once), row_stream (while training)
inputs      tokenizer_source, tokenized_rows: the tokenizer and the prepared rows of a recipe
batches     shuffling, batch_sampler, batches, train_loader
for people  preview, dropped_rows, token_bytes
"""
