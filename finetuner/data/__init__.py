"""From dataset entries to the batches of a step; each line of this list needs only those above it.

rows        raw_records, json_values, json_rows, csv_rows, file_heads, unpacking, row_files: one file, row by row
            fetch, remote_files, folder_files, source_files: which files; table_rows, row_layouts: checks of rows
            sources (all rows of an entry), streaming_source (from any row on)
texts       formats, content_pieces, message_shapes, messages, roles, unused_columns, chat_templates, pretokenized; of a
            chat: template_sandbox, template_spans, turn_endings, tool_arguments, template_outline, conversation_tails,
            answer_spans, chat_renderer
tokens      tokenizer, new_tokenizers, encoding, fastokens_backend, documents, token_store, token_store_writer
data sets   prepare, mixture, packing, prepared_data, cache (prepared once), row_stream (while training)
inputs      tokenizer_source, tokenized_rows: the tokenizer and the prepared rows of a recipe
batches     shuffling, batch_sampler, batches, train_loader
for people  preview, dropped_rows, token_bytes
"""
